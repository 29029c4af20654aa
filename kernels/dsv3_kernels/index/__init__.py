"""The lightning indexer: index keys, their scores, and the selection of positions."""
