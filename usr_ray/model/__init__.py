"""USR: embeddings, interest extractor, feature generator, multi-task layer, backbones."""
