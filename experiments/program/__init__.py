"""What every program has: a command line, refusals, pages and pictures that it writes, the commit that it runs at."""
