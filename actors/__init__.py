"""Devices as Ray actors: the control plane of a cluster. Tensors go over splitray's own sockets."""
