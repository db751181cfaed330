"""Kernels. The folder is the registry: a config value is the name of a module here, imported when chosen."""
