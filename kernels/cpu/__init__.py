"""C++ for CPUs with AVX-512, built with the machine's own compiler and called through ctypes."""
