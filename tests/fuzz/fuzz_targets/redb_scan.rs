#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge::redb_log::fuzz::scan(data));
