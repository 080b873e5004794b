"""An operator from outside the package: argmax.py says what it means and how it is cut, argmax.cuh runs on the GPU."""
