"""The command line: one thin file for each verb, which imports its feature when it runs. See `deltaw --help`."""
