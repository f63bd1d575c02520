//! Tiny bare-metal guests, embedded as ELF images.
