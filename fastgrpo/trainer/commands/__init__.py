"""One module per subcommand of `fastgrpo` that trains, evaluates or tries something."""
