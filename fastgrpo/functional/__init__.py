"""Per op: validation, the autograd function, and the documented public function."""
