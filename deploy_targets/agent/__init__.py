"""A small service for the box that serves: it is sent weights, samples and scores with them (docs/target-agent.md)."""
