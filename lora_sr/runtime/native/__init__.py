"""CPU kernels of the deployed networks: compiled on first use, see kernels.cpp."""
