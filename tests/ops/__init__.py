"""Operations of `quicksilver.ops`, against their definitions."""
