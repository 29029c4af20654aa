"""Ranks: the mesh, collectives, the rendezvous and the watchdog."""
