"""CUDA C++ and CPU sources, shipped as package data."""
