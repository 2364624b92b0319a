"""Programs of the agent that talk to places outside of the mesh, one process each, which the agent can do without at any moment."""
