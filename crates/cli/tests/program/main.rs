//! The program as its users meet it: words in, words and a status out.

mod bench;
mod broken_monitor;
mod containers;
mod damage;
mod endings;
mod guests;
mod hard_times;
mod help;
mod hints;
mod in_use;
mod kills;
mod matrix;
mod paused;
mod qemu_ends;
mod run;
mod send;
mod streams;
mod verbs;
mod verified;
mod waits;
mod wrong_input;
