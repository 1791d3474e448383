"""usr_ray: unified search and recommendation ranking on Ray Train."""

__version__ = "0.1.0"
