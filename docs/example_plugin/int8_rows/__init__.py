"""The target int8-rows. `hetero-rl targets list` imports this package to read int8-rows.toml, so it stays empty."""
