//! The program as its users call it: the tests pass arguments, and check its output and exit
//! status.

mod bench;
mod broken_monitor;
mod calls;
mod containers;
mod damage;
mod endings;
mod guests;
mod guide;
mod hard_times;
mod help;
mod hints;
mod in_use;
mod kills;
mod matrix;
mod one_moment;
mod paused;
mod qemu_ends;
mod run;
mod send;
mod streams;
mod trial;
mod verbs;
mod verified;
mod waits;
mod wrong_input;
