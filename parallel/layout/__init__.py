"""Parameters: their layouts over the axes of the mesh, their initial values, and the labels they are trained on."""
