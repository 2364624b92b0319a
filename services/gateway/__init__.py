"""The only public door of the mesh: authentication, files, the gRPC proxy and the HTTP edge.

It knows organizations, projects, keys and files; it refuses to know prices, GPUs and model weights.
"""
