"""A procedural world of sprites whose motion is known exactly: scenes, shapes, clips, captions, and a tracker."""
