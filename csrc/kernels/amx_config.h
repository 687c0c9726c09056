// The memory image that configures the eight tiles (Intel SDM volume 1, section 18.2). Inside the unit's namespace.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};

    constexpr void set(int tile, int n, int row_bytes) {
        rows[tile] = static_cast<uint8_t>(n);
        bytes[tile] = static_cast<uint16_t>(row_bytes);
    }
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");
