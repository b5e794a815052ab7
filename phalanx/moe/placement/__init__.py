"""Which physical slot holds which logical expert; one policy per file, pure."""
