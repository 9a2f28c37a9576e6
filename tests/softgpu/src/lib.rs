//! A stand-in for libcuda, libnvrtc, libcublas, libcublasLt and libnccl that runs CUDA sources on the CPU.
