"""What policies say: where models keep their projections."""
