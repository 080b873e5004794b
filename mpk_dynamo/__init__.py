"""mpk_dynamo: one persistent CUDA kernel for the decode step of a HuggingFace model."""

__version__ = "0.1.0"
