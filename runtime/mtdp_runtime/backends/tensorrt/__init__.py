"""TensorRT and TensorRT-RTX: building engines, keeping them, and running them. One code for both libraries."""
