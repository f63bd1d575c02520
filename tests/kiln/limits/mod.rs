//! Steps that try to exceed each limit; `docs/resource-limits.md` has the table.

mod cpu;
mod files;
mod given_back;
mod memory_and_processes;
mod output;
mod output_of_execs;
mod time;
