"""What runs in the worker processes. Standard library only, nothing of sva: a worker must start fast and know little."""
