"""Programs that use the package the way a node would. Example code: read it, do not build on it."""
