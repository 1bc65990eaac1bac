"""What a run says and leaves behind: metrics, its directory."""
