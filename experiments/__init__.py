"""`make evidence`: whether alignment levels and the gate help, on scenes whose true alignment is known."""
