"""Delta to batches: manifest, global order, decoding, feed."""
