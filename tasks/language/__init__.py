"""What tasks on text share: losses over symbols, and which symbols are hidden."""
