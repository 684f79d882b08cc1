"""Where changes go: the sites of a model, the targets of a config, and putting layers on and off."""

from deltaw.inject.place import Hosts, strip
from deltaw.inject.sites import Site, SiteMap, find_sites
from deltaw.inject.targets import Target, factors_as_drawn, resolve, saved_site

__all__ = ["Hosts", "Site", "SiteMap", "Target", "factors_as_drawn", "find_sites", "resolve", "saved_site", "strip"]
