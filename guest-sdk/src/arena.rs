//! The guest's allocator: a small arena that the instance is born with, and the standard allocator
//! beyond it. A message that stays within the arena never grows the memory: that is a system call,
//! and a second one when the instance goes, both of which hold up every other instance of the host.
//! Not for threads.
#![allow(unsafe_code)] // An allocator is; each use says why it is sound.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};

/// Enough for a message and what becomes of it; what is never touched costs nothing.
#[cfg(target_arch = "wasm32")]
const BYTES: usize = 256 << 10;

#[cfg(target_arch = "wasm32")]
#[global_allocator]
static GLOBAL: Arena<BYTES> = Arena::new();

/// Hands out its bytes from first to last, and starts over when all that it handed out has come
/// back.
#[repr(align(16))]
struct Arena<const BYTES: usize> {
    bytes: UnsafeCell<[u8; BYTES]>,
    /// Offset of the first byte that is free.
    next: Cell<usize>,
    /// Allocations that have not come back.
    live: Cell<usize>,
}

// SAFETY: used as a global by wasm32 components only, which have one thread.
#[cfg(target_arch = "wasm32")]
unsafe impl<const BYTES: usize> Sync for Arena<BYTES> {}

impl<const BYTES: usize> Arena<BYTES> {
    const fn new() -> Self {
        Self { bytes: UnsafeCell::new([0; BYTES]), next: Cell::new(0), live: Cell::new(0) }
    }

    fn base(&self) -> *mut u8 {
        self.bytes.get().cast()
    }

    /// Where `pointer` lies in the arena, if it does.
    fn offset(&self, pointer: *mut u8) -> Option<usize> {
        let offset = pointer.addr().wrapping_sub(self.base().addr());
        (offset < BYTES).then_some(offset)
    }

    /// The next free bytes of `layout`, if there are that many. Never empty: a global allocator is
    /// not asked for nothing.
    fn take(&self, layout: Layout) -> Option<*mut u8> {
        let base = self.base().addr();
        let start = (base + self.next.get()).checked_next_multiple_of(layout.align())? - base;
        let end = start.checked_add(layout.size()).filter(|end| *end <= BYTES)?;
        self.next.set(end);
        self.live.set(self.live.get() + 1);
        // SAFETY: `start` is at most `end`, and that is within the bytes.
        Some(unsafe { self.base().add(start) })
    }

    /// Takes `size` bytes at `offset` back.
    fn give_back(&self, offset: usize, size: usize) {
        self.live.set(self.live.get() - 1);
        if self.live.get() == 0 {
            self.next.set(0);
        } else if offset + size == self.next.get() {
            self.next.set(offset);
        }
    }
}

// SAFETY: `take` hands out bytes behind everything it handed out since the arena was last empty, so
// nothing overlaps; moving `next` back frees only the last allocation, which has come back. All
// else is `System`'s.
unsafe impl<const BYTES: usize> GlobalAlloc for Arena<BYTES> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps to the contract of `alloc`, which is `System`'s too.
        self.take(layout).unwrap_or_else(|| unsafe { System.alloc(layout) })
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        match self.offset(pointer) {
            Some(offset) => self.give_back(offset, layout.size()),
            // SAFETY: what does not lie in the arena came from `System`, with this layout.
            None => unsafe { System.dealloc(pointer, layout) },
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Some(offset) = self.offset(pointer) else {
            // SAFETY: as in `dealloc`.
            return unsafe { System.realloc(pointer, layout, size) };
        };
        // The last allocation grows and shrinks where it is: what a growing vector mostly is.
        if offset + layout.size() == self.next.get() && size <= BYTES - offset {
            self.next.set(offset + size);
            return pointer;
        }
        // SAFETY: the caller's `size` is not zero and fits the alignment; the old bytes are read
        // before they come back, and the new ones do not overlap them.
        unsafe {
            let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(pointer, layout.size().min(size));
                self.dealloc(pointer, layout);
            }
            moved
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An allocation, and the byte it was filled with.
    struct Taken(*mut u8, Layout, u8);

    impl Taken {
        fn fill(&self) {
            unsafe { self.0.write_bytes(self.2, self.1.size()) };
        }

        fn holds(&self, bytes: usize) -> bool {
            unsafe { std::slice::from_raw_parts(self.0, bytes) }.iter().all(|byte| *byte == self.2)
        }
    }

    #[test]
    fn allocations_never_overlap_and_keep_what_is_in_them() {
        let arena = Arena::<4096>::new();
        let (mut taken, mut random): (Vec<Taken>, _) = (Vec::new(), 7_u64);
        let mut draw = move |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % below
        };
        let (mut inside, mut outside) = (0, 0);
        for step in 0..20_000 {
            match draw(3) {
                0 => {
                    let layout = Layout::from_size_align(1 + draw(300), 1 << draw(5)).expect("a layout");
                    let new = Taken(unsafe { arena.alloc(layout) }, layout, step as u8);
                    assert!(new.0.addr().is_multiple_of(layout.align()));
                    *if arena.offset(new.0).is_some() { &mut inside } else { &mut outside } += 1;
                    new.fill();
                    taken.push(new);
                }
                1 if !taken.is_empty() => {
                    let old = taken.swap_remove(draw(taken.len()));
                    assert!(old.holds(old.1.size()));
                    unsafe { arena.dealloc(old.0, old.1) };
                }
                _ if !taken.is_empty() => {
                    let (place, size) = (draw(taken.len()), 1 + draw(600));
                    let old = &mut taken[place];
                    let kept = old.1.size().min(size);
                    old.0 = unsafe { arena.realloc(old.0, old.1, size) };
                    assert!(old.holds(kept));
                    old.1 = Layout::from_size_align(size, old.1.align()).expect("a layout");
                    old.fill();
                }
                _ => {}
            }
            if draw(100) == 0 {
                for old in taken.drain(..) {
                    assert!(old.holds(old.1.size()));
                    unsafe { arena.dealloc(old.0, old.1) };
                }
                assert_eq!((arena.live.get(), arena.next.get()), (0, 0), "an empty arena starts over");
            }
        }
        assert!(inside > 1000 && outside > 100, "{inside} inside, {outside} outside: one way was not tried");
        taken.drain(..).for_each(|old| unsafe { arena.dealloc(old.0, old.1) });
    }

    #[test]
    fn a_vector_that_grows_stays_where_it_is() {
        let arena = Arena::<4096>::new();
        let layout = |size| Layout::from_size_align(size, 8).expect("a layout");
        let first = unsafe { arena.alloc(layout(100)) };
        assert_eq!(unsafe { arena.realloc(first, layout(100), 4096) }, first, "the last one, to the brim");
        assert_eq!(unsafe { arena.realloc(first, layout(4096), 8) }, first);
        let second = unsafe { arena.alloc(layout(8)) };
        assert_eq!(second.addr() - first.addr(), 8, "what it gave back is used");
        let over = unsafe { arena.realloc(second, layout(8), 5000) };
        assert!(arena.offset(over).is_none(), "too large: the standard allocator's");
        unsafe {
            arena.dealloc(over, layout(5000));
            arena.dealloc(first, layout(8));
        }
    }
}
