//! Thin: everything is in the library.
fn main() -> std::process::ExitCode {
    proxy_daemon::app::main()
}
