"""What people see: pictures, tables and quantities in words. Knows how nothing came about."""
