"""Ways to run the mesh: as processes on one machine (`local`) and as containers."""
