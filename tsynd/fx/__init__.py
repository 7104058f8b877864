"""Surgery on traced graphs: parts of networks, folded normalisation, checkpointing."""
