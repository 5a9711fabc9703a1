"""Drills: real runs that meet a fault. Every drill is a program; `make drills` runs all."""
