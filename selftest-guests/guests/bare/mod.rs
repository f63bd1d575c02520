//! What a guest needs that stands on nothing: the PVH note (both entries are `_start`), and a
//! panic handler because the compiler asks for one.

core::arch::global_asm!(
    // XEN_ELFNOTE_PHYS32_ENTRY, as in Xen's public elfnote.h.
    ".pushsection .note.Xen, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad _start",
    ".popsection",
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
