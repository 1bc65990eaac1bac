"""What a run says and leaves behind: metrics, reports, its directory."""
