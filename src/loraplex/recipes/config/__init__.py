"""RUN.yaml: its keys and types, and the libraries' arguments that are made from them."""
