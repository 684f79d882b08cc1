"""Where changes go: the sites of a model, the targets of a config, and putting layers on and off."""

from deltaw.inject.place import Hosts, strip
from deltaw.inject.sites import Site, SiteMap, find_sites
from deltaw.inject.targets import Target, resolve, saved_site

__all__ = ["Hosts", "Site", "SiteMap", "Target", "find_sites", "resolve", "saved_site", "strip"]
