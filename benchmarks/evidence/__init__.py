"""Which recipe serves which target: whole training runs through real engines, arm by arm and seed by seed."""
