"""Where the dataset is read from, and which version of a file its bytes are. It must not know that there is a cache."""
