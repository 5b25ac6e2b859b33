"""Serving runtimes, one file each, behind `deploy_targets.protocols.Engine`."""
