"""One thread for torch: the tensors are small, and a second thread only waits on a busy machine."""

import torch

torch.set_num_threads(1)
