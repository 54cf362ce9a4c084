"""From files to batches: `sources` reads rows, `formats` says what they mean, `encode` tokenises, `batches` groups."""
