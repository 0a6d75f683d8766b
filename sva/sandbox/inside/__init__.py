"""What runs in the worker processes. Standard library only: a worker starts fast and knows little."""
