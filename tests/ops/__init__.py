"""What `cluster/` holds, checked by the programs that will read it. `make test-ops` runs these tests."""
